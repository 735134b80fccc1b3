-- Gives a worker as many claimable jobs as it has free slots, oldest first, and opens an attempt of each.
-- KEYS[1] the queue
-- ARGV: 1 prefix, 2 worker id, 3 free slots, 4 run timeout in ms, 5 time to live of an unfinished job in ms
-- Returns nothing if the worker holds no lease, since nobody would notice its death. Otherwise a list of {job id,
-- attempt, started ms, request}; ids whose job is gone or has ended are dropped on the way.

local worker, now = ARGV[2], now_ms()
local lease_end = redis.call('ZSCORE', workers, worker)
if not lease_end or tonumber(lease_end) <= now then return {} end

local claimed = {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', int(now), 'LIMIT', 0, ARGV[3])) do
  local job = redis.call('HMGET', job_key(id), 'status', 'attempt', 'opened')
  if job[1] == 'queued' then
    local attempt = int(tonumber(job[2]))
    if job[3] ~= attempt then -- recovery has opened the attempt already, to fence the one before
      attempt = int(tonumber(job[2]) + 1)
      local opened = redis.pcall('XADD', stream_key(id), attempt .. '-0', 'open', worker)
      if type(opened) == 'table' and opened.err then -- out of memory: keep what is claimed, leave the rest queued
        if #claimed == 0 then return opened end
        break
      end
      redis.call('PUBLISH', stream_channel(id), attempt .. '-0 open ' .. worker)
    end
    local deadline = int(now + tonumber(ARGV[4]))
    redis.call('HSET', job_key(id), 'status', 'running', 'attempt', attempt, 'opened', attempt, 'worker', worker,
               'started_ms', int(now), 'deadline_ms', deadline)
    redis.call('ZADD', deadlines, deadline, id)
    redis.call('SADD', worker_jobs_key(worker), id)
    redis.call('PEXPIRE', worker_jobs_key(worker), ARGV[5])
    for _, key in ipairs({job_key(id), request_key(id), attachments_key(id), stream_key(id), arq_job_key(id)}) do
      redis.call('PEXPIRE', key, ARGV[5])
    end
    claimed[#claimed + 1] = {id, attempt, int(now), redis.call('GET', request_key(id))}
  end
  redis.call('ZREM', KEYS[1], id)
end

if redis.call('ZCARD', KEYS[1]) > 0 then ring() else redis.call('DEL', bell) end
return claimed
