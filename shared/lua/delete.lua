-- Deletes a job that has ended, with all that it said.
-- KEYS[1] the job record
-- ARGV: 1 prefix, 2 job id
-- Returns 'done', or without any change: 'gone' | 'unfinished'.

local REMEMBERED_MS = 600000 -- where the job stood in the lists, for a client that pages on from it

local id = ARGV[2]
local status, tenant, kind, store, model, error, session, worker, pairs_of_job, accepted_ms =
  unpack(redis.call('HMGET', KEYS[1], 'status', 'tenant', 'kind', 'store', 'model', 'error', 'session', 'worker',
                    'pairs', 'accepted_ms'))
if not status then return 'gone' end
if not is_terminal(status) then return 'unfinished' end
-- A worker that has not said yet that it stopped keeps its slot and its session until the sweep frees them.
if redis.call('ZSCORE', deadlines, id) then return 'unfinished' end
redis.call('UNLINK', KEYS[1], request_key(id), attachments_key(id), stream_key(id), times_key(id))
redis.call('ZREM', shelf_key(shelf_of(tenant, kind, store, status, error_code(error), model)), id)
take_from_sets(id, tenant, session, worker, pairs_of_job or '')
if redis.call('HGET', webhook_key(id), 'state') ~= 'pending' then redis.call('UNLINK', webhook_key(id)) end
-- Behind what has freed memory; without any, it is the client that has to begin its list again.
redis.pcall('SET', deleted_key(tenant .. ':' .. id), accepted_ms, 'PX', REMEMBERED_MS)
return 'done'
