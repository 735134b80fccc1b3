-- Gives a job other metadata.
-- KEYS[1] the job record
-- ARGV: 1 prefix, 2 job id, 3 the metadata, 4 the digests of its pairs, apart by spaces
-- Returns 1, or 0 if there is no such job.

local id, metadata, pairs_of_job = ARGV[2], ARGV[3], ARGV[4]
local status, tenant, kind, store, model, error, session, worker, pairs_before, accepted_ms =
  unpack(redis.call('HMGET', KEYS[1], 'status', 'tenant', 'kind', 'store', 'model', 'error', 'session', 'worker',
                    'pairs', 'accepted_ms'))
if not status then return 0 end
redis.call('HSET', KEYS[1], 'metadata', metadata, 'pairs', pairs_of_job)
take_from_sets(id, tenant, '', '', pairs_before or '')
put_among_pairs(tenant, pairs_of_job, id, accepted_ms, redis.call('PTTL', KEYS[1]))
if is_terminal(status) then
  note_ended(shelf_of(tenant, kind, store, status, error_code(error), model), id,
             status == 'succeeded' and '' or worker, pairs_of_job, session)
end
return 1
