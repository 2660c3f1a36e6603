"""``recurra bench``: verifies every shape, then times it beside this machine's floor and its peers.

:mod:`.cases` says what is timed, :mod:`.floors` what the machine could do at most, :mod:`.peers`
what else could be used, :mod:`.timing` how a time is taken, :mod:`.report` how it is printed.
"""
