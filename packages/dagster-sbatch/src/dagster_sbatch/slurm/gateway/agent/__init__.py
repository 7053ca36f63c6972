"""The gateway agent: what has to be done on a login node, over one pair of pipes.

Standard library, Python 3.6: the client sends these modules along as one program, nothing is installed. It is run with
`python3 -I -S -u -X utf8 -c`, reads requests from stdin and writes answers to stdout, each a line of JSON:

    stdin   {"id": 1, "do": "jobs.run", "run": "/path/KEY", "files": {"job.sh": "..."}, ...}
    stdout  {"id": 0, "hello": "gateway-agent 1", ...}          what comes before is not ours: banners, profiles
            {"id": 1, "job": "1184", "how": "submitted"}
            {"id": 1, "file": "stdout", "at": 0, "size": 13}    13 raw bytes follow that line
            {"id": 2, "error": "refused", "text": "..."}        final; `temporary`: the client repeats the request with
                                                                growing pauses; `broken`: a few times

A request with a `size` is followed by this many raw bytes, too. `do` names a module and a function in it; a
module's functions that can be asked for stand below the line `# Requests`.

Requests are independent of each other and may be repeated: the run directory remembers, the agent does not. It lives as
long as its stdin, and no longer than `server.SILENCE` without a byte from its client, since a laptop that sleeps closes
nothing.
"""
