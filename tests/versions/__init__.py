"""Tests on several versions of vLLM, what came of them, and what changes from one to the next."""
