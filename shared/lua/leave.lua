-- A client that waited for a job has gone away. The job of the last one is cancelled.
-- KEYS[1] the job record
-- ARGV: 1 prefix, 2 job id, 3 id of the submission by which the client waited, which counts once, 4 the error marker's
--       payload, 5 retention in ms, 6 '1' if the client may come back soon: then a job that runs is left as it is, to be
--       asked for again
-- Returns 'done' | 'others' (somebody else waits for it, or nobody has to) | without any change: 'later' | 'gone' | the
-- terminal status that the job has already.

local id = ARGV[2]
local job = redis.call('HMGET', KEYS[1], 'status', 'waiters')
if not job[1] then return 'gone' end
if is_terminal(job[1]) then return job[1] end
if not job[2] then return 'others' end
if ARGV[6] == '1' and job[1] == 'running' and tonumber(job[2]) <= 1 then return 'later' end
even_without_memory()
if redis.call('HSETNX', KEYS[1], 'left:' .. ARGV[3], '1') == 0 then return 'others' end
if redis.call('HINCRBY', KEYS[1], 'waiters', -1) > 0 then return 'others' end
end_from_outside(id, ARGV[4], 'cancelled', now_ms(), ARGV[5])
return 'done'
