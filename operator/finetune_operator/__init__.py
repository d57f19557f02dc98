"""The operator: FineTuneJobs in, Jobs and an honest status out. Events -> queue -> observe -> decide -> execute."""
