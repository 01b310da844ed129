"""Sphinx's settings for the site. build.py prepares the pages and names what it found in the environment."""

import os
from pathlib import Path
from typing import Any

project = "asyncbatch"
copyright = "the asyncbatch authors; text CC BY 4.0, code Apache 2.0"
extensions = ["myst_nb"]
root_doc = "index"
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type"]

# Notebooks are shown as they were saved. Nothing is run, and nothing is fetched when a page is opened.
nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js = {}
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
myst_heading_anchors = 4
html_show_search_summary = False  # it would read the pages found, which a browser forbids in a folder

html_theme = "sphinx_book_theme"
html_title = "asyncbatch"
html_context = {"default_mode": "auto"}
html_static_path = [str(Path(__file__).with_name("static"))]
html_css_files = ["site.css"]
html_copy_source = False
html_use_index = False
html_show_sphinx = False
html_theme_options: dict[str, Any] = {
    "use_download_button": False,
    "use_fullscreen_button": True,
    "show_toc_level": 2,
    "navigation_with_keys": True,
    "home_page_in_toc": True,
    "navbar_persistent": [],  # its search field stands in the side bar already
}
if repository := os.environ.get("SITE_REPOSITORY"):
    html_theme_options |= {
        "repository_url": repository,
        "repository_branch": "main",
        "path_to_docs": "",
        "use_repository_button": True,
        "use_issues_button": True,
        "launch_buttons": {
            "binderhub_url": "https://mybinder.org",
            "colab_url": "https://colab.research.google.com",
            "notebook_interface": "jupyterlab",
        },
    }
