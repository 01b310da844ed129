"""What can go wrong when the order of things is left to chance.

races    two accesses of the same memory that nothing puts in order, found whatever the times are
explore  every order in which a small program can run, and what each leaves behind
toy      a model whose every token depends on the whole context, so that damage shows
faults   what can be taken away from the asynchronous loop
ranks    several ranks that serve the same requests, and how they agree on what comes in
rank_faults  what makes one rank plan another step than the others
trials   each fault put into a batcher, and how it is found: `python -m asyncbatch.faults`
"""
