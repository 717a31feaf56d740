"""Answers to an operator's questions about settings and servers;
nothing here prints, `redis_asgi.cli` does.

``servers``   which servers the settings name           ``rights``   which commands on which keys they must allow
``trouble``   why Redis cannot be used, in words        ``findings`` what settings and INFO say, without I/O
``diagnosis`` all that is looked at before a deploy     ``quotas``   what a client has left, and giving it back
``sizing``    how much memory things take                 ``apps``     what limits an app that is imported
``reference`` what each setting is, and is for
"""
