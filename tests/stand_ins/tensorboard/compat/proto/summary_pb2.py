"""A stand-in for TensorBoard's messages: they hold what they are made with."""

from types import SimpleNamespace


class Summary(SimpleNamespace):
    class Value(SimpleNamespace):
        pass


class SummaryMetadata(SimpleNamespace):
    class PluginData(SimpleNamespace):
        pass
