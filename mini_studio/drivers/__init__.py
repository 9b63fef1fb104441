"""What the studio drives outside itself. `ports` says what each driver must do; one module here knows each outside system."""
