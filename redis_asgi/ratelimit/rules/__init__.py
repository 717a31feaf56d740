"""Rules: which of them cover a request, whom each counts, and what it charges.

``plan``        what requests of one shape are put to, and what they are charged: the way in
                (``recent``: what it remembers)
``compiled``    one rule as requests meet it: where a path is matched; ``routing``: where the app
                has it
``rule``        one as users write it, its ``checks`` and ``policies``; ``coverage``: what an app's
                document says
``partition``   who shares a counter; ``joined``: by several things; ``by_body``: by a JSON body
                (``reading``), ``by_mcp_tool``: by the tool it calls
``exemptions``  what is never counted; ``endpoints``: what a request is on its way to
``last_limits`` and ``misconfiguration``: where a callable or a deployment is at fault
"""
