"""The REST front: handlers of about ten lines, one place for errors, one for dependencies."""
