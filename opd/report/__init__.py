"""The HTML report of runs: data, pages, and a local live server."""
