"""Wrong changes to the endpoint; see `mutations.py`. Number 12 stands for what docs/endpoint.md says."""

# ruff: noqa: E501

FOLLOWING, ROUTES, TEXT, PROCESS = (f"endpoint/test_{name}.py::test_" for name in ("following", "routes", "text", "process"))
FOLLOWED = FOLLOWING + "a_deletion_is_followed_and_an_answer_is_of_one_state"
OLDER = FOLLOWING + "an_older_copy_of_the_store_is_refused"
UNREACHED = FOLLOWING + "a_store_that_cannot_be_reached_makes_it_not_ready"
TOKEN = FOLLOWING + "who_has_the_token_deletes"
ONE_ANSWER = FOLLOWING + "all_that_a_thread_asks_in_a_block_is_one_answer"

ENDPOINT = (
    (12, 'an older copy of the store answers in the place of a newer one', 'serving/following.py',
     (('        if manifest.generation < generation:', '        if False:'),), (OLDER,)),
    (12, 'a state that is too old answers on', 'endpoint/watch.py',
     (('        if self.age > self.max_staleness:', '        if False:'),), (UNREACHED,)),
    (12, 'a look that failed counts as one that succeeded', 'endpoint/watch.py',
     (('            self._problem = problem\n', '            self._problem, self._looked = problem, began\n'),), (UNREACHED,)),
    (12, 'whether it may answer is not asked again when a turn comes', 'endpoint/batcher.py',
     (('                self._check()\n', ''),), (UNREACHED,)),
    (12, 'the bare base answers where nothing of the store is live', 'endpoint/watch.py',
     (('        if not self.model.members and not self.model.pending:', '        if False:'),), (FOLLOWING + 'the_bare_base_does_not_answer',)),
    (12, 'the store is never looked at again', 'endpoint/watch.py',
     (('            self.model.refresh(wait=False)', '            pass'),), (FOLLOWED,)),
    (12, 'what a thread asks in a block is several answers, of different states', 'serving/ensemble.py',
     (('        with self._answers.answering() as state:\n            yield state.generation', '        yield self.generation'),), (ONE_ANSWER,)),
    (12, 'a wrong token deletes', 'endpoint/erasure.py',
     (('not hmac.compare_digest(given.encode(), expected) or ', ''),), (TOKEN,)),
    (12, 'a token that begins as the right one does deletes', 'endpoint/erasure.py',
     (('hmac.compare_digest(given.encode(), expected)', 'given.encode().startswith(expected)'),), (TOKEN,)),
    (12, 'deletions are answered although nobody allowed them', 'endpoint/app.py',
     (('    if settings.delete_token is not None:\n', '    if True:\n'), ('settings.delete_token)', 'settings.delete_token or "a token of the tests that is long enough")')),
     (FOLLOWING + 'there_is_no_deletion_unless_it_was_allowed',)),
    (12, 'an endpoint that may not delete takes the key', 'endpoint/settings.py',
     (('if found := [name for name in SECRETS if environment.get(name)]:', 'if found := []:'),), (ROUTES + 'secrets_are_for_those_who_delete',)),
    (12, 'a short token is good enough', 'endpoint/settings.py',
     (('len(self.delete_token) < LEAST_TOKEN', 'len(self.delete_token) < 1'),), (ROUTES + 'settings_are_checked[given3-HF_S3T_DELETE_TOKEN has 5 characters]',)),
    (12, 'the queue has no bound', 'endpoint/batcher.py',
     (('if len(self._waiting) >= self.max_queue:', 'if False:'),), (FOLLOWING + 'more_than_may_wait_are_told_to_come_again',)),
    (12, 'a long prompt makes every row of its batch as long', 'endpoint/batcher.py',
     ((' or more * length > self.max_batch_tokens', ''),), (FOLLOWING + 'a_batch_is_as_large_as_may_be',)),
    (12, 'whoever hangs up is answered to the end', 'endpoint/generation.py',
     (('        elif self.job.cancelled:', '        elif False:'),), (FOLLOWING + 'more_than_may_wait_are_told_to_come_again',)),
    (12, 'what waits is dropped when the endpoint ends', 'endpoint/batcher.py',
     (('while jobs := self._next():', 'while (jobs := self._next()) and not self._stopped:'),), (FOLLOWING + 'what_waits_is_answered_before_the_thread_ends',)),
    (12, 'SIGTERM drops the answers that run', 'endpoint/server.py',
     (('lifespan="on")', 'lifespan="on", timeout_graceful_shutdown=0)'),), (PROCESS + 'clients_ask_while_another_process_deletes',)),
    (12, 'a seed is that of the batch, not of the row', 'endpoint/generation.py',
     (('        self._random = torch.Generator().manual_seed(seed)', '        torch.manual_seed(seed)\n        self._random = None'),),
     (ROUTES + 'the_same_seed_is_the_same_answer_whoever_is_in_the_batch',)),
    (12, 'the padding of shorter prompts is read', 'endpoint/generation.py',
     (('[0] * gap + [1] * (longest - gap)', '[1] * longest'),), (ROUTES + 'the_same_seed_is_the_same_answer_whoever_is_in_the_batch',)),
    (12, "the first row's temperature is every row's", 'endpoint/generation.py',
     (('settings = [(row.prompt.temperature, row.prompt.top_p) for row in rows]', 'settings = [(rows[0].prompt.temperature, row.prompt.top_p) for row in rows]'),),
     (ROUTES + 'the_same_seed_is_the_same_answer_whoever_is_in_the_batch',)),
    (12, 'the beginning of a stop text is given away', 'endpoint/generation.py',
     (('held = max((_beginning(text, stop) for stop in self._stop), default=0)', 'held = 0'),), (TEXT + 'what_is_given_away_is_never_taken_back',)),
    (12, 'half a character is given away', 'endpoint/generation.py',
     (('if text.endswith("\\ufffd") and', 'if False and'),), (TEXT + 'characters_come_whole',)),
    (12, 'what is not supported is passed over in silence', 'endpoint/protocol.py',
     (('            if value is not None and not any(', '            if False and not any('),),
     (ROUTES + 'what_cannot_be_done_is_refused_by_name[given3-expected3]',)),
    (12, 'a prompt may be longer than the model', 'endpoint/prompts.py',
     (('            if left < (most or 1):', '            if False:'),), (ROUTES + 'what_cannot_be_done_is_refused_by_name[given16-expected16]',)),
)
