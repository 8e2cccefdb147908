"""What each method does, a module for each group of nouns. The same groups have their commands in
`daemon.admin.commands`.
"""
