from types import SimpleNamespace


class Event(SimpleNamespace):
    pass
