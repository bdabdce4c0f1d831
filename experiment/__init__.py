"""What every command needs: files, working directories, logs, randomness, flags, jobs side by side."""
