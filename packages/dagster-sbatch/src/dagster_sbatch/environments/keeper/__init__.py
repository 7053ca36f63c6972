"""What is done with environments on the login node: looking, installing, publishing, removing.

Standard library, Python 3.6: these modules are sent along as one program. What only looks is answered in the gateway's
agent itself. For all else, the agent runs the program with a request as a line of JSON on stdin, and it prints lines of
JSON, the last of which is the answer; what is refused goes to stderr in words. It ends when its stdin does. Requests
may be repeated and may come from several clients at once; whatever changes something holds one lock.

    <folder>/wheels/<hash>/NAME.whl   as they were sent
             packages/<hash>/lib/     installed wheels: a lock, for one kind of Python
             <hash>/                  an environment: bin/python, lib -> ../packages/<hash>/lib, workloads/
             published.json           what production runs, the latest last
             .interpreter-<hash>.json what an interpreter said of itself

All but the last two names of each kind are made under another name and appear by a rename, read-only from then on.
"""
