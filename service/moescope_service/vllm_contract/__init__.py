"""What moescope relies on in vLLM, and how it changes it.

`versions` names the versions that were tested, `internals` lists what is used of them, `guard`
refuses a vLLM that is not one of these or lacks one of those, and `patching` replaces vLLM's
functions. Importing a module of this package imports nothing of vLLM.
"""
