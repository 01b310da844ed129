"""The first minute: `python -m asyncbatch` shows what asynchronous batching does, and for whom.

command: the command line, with the sub-commands; imports nothing heavy, so that something is said at once.
measuring: what is measured, the embedded model's answers, and this host beside a recorded GPU.
replay: a recorded pair of runs on a virtual clock, which shows the point where this machine is too busy to.
findings: what that says, in sentences and one table. drawing: both timelines as lines of text.
screen, page: all of it in a terminal, and as one page.
notebooks: copies of the notebooks, from a clone or from an installed package. links: where a copy's links lead.
"""
