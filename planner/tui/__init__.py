"""The wizard: from a machine to a verified model in a terminal.

It holds no logic and no number that the command line cannot print: every screen asks ``planner.workflow`` in a thread
and shows what comes back. One immutable state goes from screen to screen; screens and threads speak in messages.
"""
