"""What each lesson's exercises must do: one module per lesson, each with a list called EXERCISES."""
