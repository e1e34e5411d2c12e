"""The pages that people look at in a browser: HTML, CSS and a little JavaScript."""
