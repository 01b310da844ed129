"""The site: `make site` builds it from notebooks, README and docs. build.py does it, look.py opens it in a browser."""
