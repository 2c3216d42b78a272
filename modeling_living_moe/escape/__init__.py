"""Topological escape: a block that stagnates works in another space for a time.

spaces.py has the spaces, module.py the gated module of a block, detector.py when to go,
api.py what the model does about it.
"""
