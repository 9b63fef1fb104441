"""What happened: facts, their envelope and their topics. Imports no I/O library and nothing of the REST schemas."""
