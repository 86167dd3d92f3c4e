from types import SimpleNamespace


class TensorProto(SimpleNamespace):
    pass
