"""Reading token by token, and drafts of several tokens."""
