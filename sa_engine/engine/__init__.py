"""The whole loop from one file: what the file says, how far the loop is, and the page that shows it."""
