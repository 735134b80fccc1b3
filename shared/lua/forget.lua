-- A request has its answer: the next one that looks the same is another one.
-- KEYS[1] the job of the request that may come twice
-- ARGV: 1 prefix, 2 job id
-- Returns 1, or 0 if another job has taken its place.

local job_id = string.match(redis.call('GET', KEYS[1]) or '', '^%S+')
return job_id == ARGV[2] and redis.call('DEL', KEYS[1]) or 0
