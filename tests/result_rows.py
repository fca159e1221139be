"""The rows of a study's results."""


def find(rows, table, name, metric, selection="last"):
    """The one row of that table, name and metric."""
    (found,) = [
        row
        for row in rows
        if (row["table"], row["row"], row["metric"], row["selection"])
        == (table, name, metric, selection)
    ]
    return found
