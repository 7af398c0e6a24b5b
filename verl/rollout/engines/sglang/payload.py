"""Named tensors by value, in the form that ``/update_weights_from_tensor`` takes: buckets of a pickled list, in base64.

SGLang's own helpers send handles of shared memory, which mean nothing to another machine. A plain pickle holds a
tensor's bytes, and consists of nothing but torch's functions, which are all that the server's unpickler admits.
"""

from __future__ import annotations

import base64
import json
import pickle

import torch

Bucket = list[tuple[str, torch.Tensor]]


def update_body(bucket: Bucket, ranks: int, weight_version: str | None) -> bytes:
    """The request's JSON. Every tensor-parallel rank is sent all of it, and keeps its part."""
    # Written by hand: json would look at every one of millions of characters, all of which base64 keeps harmless.
    encoded = b'"' + base64.b64encode(pickle.dumps(bucket)) + b'"'
    tensors = b", ".join([encoded] * ranks)
    rest = json.dumps({"flush_cache": False, "weight_version": weight_version}).encode()
    return b'{"serialized_named_tensors": [' + tensors + b"], " + rest[1:]
