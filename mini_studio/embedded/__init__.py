"""The whole studio on one machine, from Python packages alone: a broker, an S3 server and a Ray head beside the studio's own processes.

launcher    the checks before a start, then `__main__` in this process's place
__main__    `python -m mini_studio.embedded --data DIR --port N`: the supervisor, nothing but psutil beside the standard library
supervisor  starts, watches, restarts and stops the parts
guardian    ends everything when the supervisor was killed
"""
