"""What the tasks share: parameter groups, schedule, batch arithmetic, callbacks, and the command that runs them."""
