"""What turns measurements into verdicts: experiments and claims, what is remembered, statistics, the report."""
