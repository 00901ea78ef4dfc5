"""Shapes as LabelMe writes them."""

TRIANGLE = [[1, 1], [4, 1], [4, 3]]


def shape(points, kind="polygon", label="STAS") -> dict:
    return {"label": label, "points": points, "group_id": None, "shape_type": kind, "flags": {}}
