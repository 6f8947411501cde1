"""What a report looks like: in a terminal, as a file of JSON, as a page. All of it is made of its facts as JSON has
them, so that what was written once can be shown again."""
