"""Changes to the tree of a config file."""


def put(tree, changes):
    """Changes fields that the tree has and returns it. A name has dots, or two underscores for each; of two changes of
    one field the last counts."""
    for name, value in changes.items():
        *parts, last = name.replace("__", ".").split(".")
        part = tree
        for step in parts:
            part = part[step]
        assert last in part, name
        part[last] = value
    return tree
