"""``moescope diff``: the same prompts on two servers, compared row by row."""
