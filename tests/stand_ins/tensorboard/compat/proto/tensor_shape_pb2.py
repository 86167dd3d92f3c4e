from types import SimpleNamespace


class TensorShapeProto(SimpleNamespace):
    class Dim(SimpleNamespace):
        pass
