"""The reference plugins beside podlane: the same configuration given to both, and what can be observed compared.

`sides` are the two nodes; `acts` do something on one of them and write down what is seen; `cases_*` are the
configurations; `differences_*` are those that are known, with their reasons; `table` makes the README's table of them.
"""
