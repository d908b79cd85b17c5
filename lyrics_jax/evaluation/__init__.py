"""What a trained model is worth: its answers to questions, its recall, and reports for a person."""
