"""Reading an ASGI scope: paths, client addresses, bodies. And the base of the package's own apps.

``paths``      spellings of a path, and the patterns that cover them
``scope``      header fields, the client's address (``forwarded``), a buffered body
``fields``     the grammar of header fields
``bodies``     what is read ahead of the app, within ``body_budget``
``offer``      what middlewares offer to those below them
``sub_app``    the base of what is mounted beside an app; ``problem``: documents that refuse
"""
