"""What a running process needs: its rank, a stop flag, logs and progress."""
