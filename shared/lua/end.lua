-- Ends a job from outside of its attempt: cancelled, or its worker cannot go on with it.
-- KEYS[1] the job record
-- ARGV: 1 prefix, 2 job id, 3 status, 4 the error marker's payload, 5 retention in ms
-- Returns 'done', or without any change 'gone' | the terminal status that the job has already.

local status = redis.call('HGET', KEYS[1], 'status')
if not status then return 'gone' end
if is_terminal(status) then return status end
even_without_memory()
end_from_outside(ARGV[2], ARGV[4], ARGV[3], now_ms(), ARGV[5])
return 'done'
