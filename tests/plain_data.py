"""Values as JSON and back, bit for bit: what a calibration holds, under short tags instead of the names of classes.

Known are None, numbers, text, lists, tuples, sets, mappings with any keys, numpy arrays and scalars, DataFrames, and
the dataclasses and named tuples of a table ``tag -> class``. NaN and infinities are kept; functions, types and whatever
else are refused, with the type in the sentence.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
import pandas as pd

PLAIN = (type(None), bool, int, float, str)


def encode(value, classes, left_out):
    """``value`` for ``json.dumps``; fields of ``left_out``, ``tag -> names``, are not stored."""

    def plain(value):
        if type(value) in PLAIN:
            return value
        if isinstance(value, np.ndarray | np.generic):
            return {"array": [str(value.dtype), list(value.shape), value.ravel().tolist()]}
        if isinstance(value, pd.DataFrame):
            named = [(value.index.name, value.index), *value.items()]
            return {"frame": [[name, str(one.dtype), [plain(cell) for cell in one.tolist()]] for name, one in named]}
        tag = next((tag for tag, one in classes.items() if one is type(value)), None)
        if tag is not None:
            every = value._fields if isinstance(value, tuple) else [field.name for field in dataclasses.fields(value)]
            return {tag: {name: plain(getattr(value, name)) for name in every if name not in left_out.get(tag, ())}}
        if isinstance(value, Mapping):
            return {"dict": [[plain(key), plain(one)] for key, one in value.items()]}
        if type(value) in (list, tuple, set):
            return {type(value).__name__: [plain(one) for one in value]}
        raise TypeError(f"{type(value)} has no tag: name it in the table of classes")

    return plain(value)


def decode(data, classes, renamed, given):
    """The value again; ``renamed`` is ``tag.field as stored -> field now``, ``given`` ``tag -> fields not stored``."""

    def value(data):
        if not isinstance(data, dict):
            return data
        ((tag, held),) = data.items()
        if tag == "array":
            kind, shape, flat = held
            return np.array(flat, dtype=kind).reshape(shape)[()]
        if tag == "frame":
            (name, kind, labels), *columns = held
            index = pd.Index([value(label) for label in labels], dtype=kind, name=name)
            cells = {column: pd.Series([value(c) for c in of], dtype=kind, index=index) for column, kind, of in columns}
            return pd.DataFrame(cells, index=index)
        if tag == "dict":
            return {value(key): value(one) for key, one in held}
        if tag in ("list", "tuple", "set"):
            return {"list": list, "tuple": tuple, "set": set}[tag](map(value, held))
        fields = {renamed.get(f"{tag}.{name}", name): value(one) for name, one in held.items()}
        return classes[tag](**fields, **given.get(tag, {}))

    return value(data)
