"""The commands of `cleavectl`, a module for each group of nouns, as the handlers of
`daemon.control.handlers`.
"""
