"""``moescope verify``: are the routes of a running server those of its model?"""
