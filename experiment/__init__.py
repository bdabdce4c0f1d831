"""What every command needs: files, working directories, randomness, flags, jobs in parallel, tables, figures."""
