-- Which of many readers have to look at their stream, although they have heard nothing.
-- KEYS[1] the deadlines
-- ARGV: 1 prefix, then for each reader: job id, the last entry id that it has seen
-- Returns the ids of the jobs that have an entry behind it, that have ended, or that are gone.

local stale = {}
for i = 2, #ARGV, 2 do
  local id, cursor = ARGV[i], ARGV[i + 1]
  local status = redis.call('HGET', job_key(id), 'status')
  local waits = status == 'queued' and cursor == '0-0'
  local runs = (status == 'queued' or status == 'running') and redis.call('EXISTS', stream_key(id)) == 1
  if not (waits or runs) or #redis.call('XRANGE', stream_key(id), '(' .. cursor, '+', 'COUNT', 1) > 0 then
    stale[#stale + 1] = id
  end
end
return stale
