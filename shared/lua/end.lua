-- Ends a job from outside of its attempt: cancelled, or its worker cannot go on with it.
-- KEYS[1] the job record
-- ARGV: 1 prefix, 2 job id, 3 status, 4 the error marker's payload, 5 retention in ms, 6 worker id and 7 attempt, if the
--       job is to end only while it runs there; otherwise '' and ''
-- Returns 'done', or without any change 'gone' | 'fenced' | the terminal status that the job has already.

local job = redis.call('HMGET', KEYS[1], 'status', 'worker', 'attempt')
if not job[1] then return 'gone' end
if is_terminal(job[1]) then return job[1] end
if ARGV[6] ~= '' and (job[1] ~= 'running' or job[2] ~= ARGV[6] or job[3] ~= ARGV[7]) then return 'fenced' end
even_without_memory()
end_from_outside(ARGV[2], ARGV[4], ARGV[3], now_ms(), ARGV[5])
return 'done'
