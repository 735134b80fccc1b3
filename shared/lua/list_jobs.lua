-- Finds jobs in the index, in the order of their acceptance. Looks through the fewest that hold all of them.
-- KEYS[1] the shelves
-- ARGV: 1 prefix, 2 most jobs to return, 3 most jobs to look at, 4 'asc' | 'desc',
--       5 least and 6 greatest instant of acceptance in ms, or '', 7 instant and 8 id of the job to begin behind, or '',
--       then what is asked for, '' for anything: 9 statuses apart by spaces, 10 tenant, 11 kind, 12 store, 13 model,
--       14 error code, 15 session, 16 worker, 17.. digests of pairs of metadata
-- Returns {'1' if there may be more, instant and id of the last job that was looked at, then a list of {id, fields and
-- values of the record} of what was found}. What is in the index without a record is taken out of it.

local most, ascending = tonumber(ARGV[2]), ARGV[4] == 'asc'
local since_ms, until_ms, after_ms, after_id = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7]), ARGV[8]
local statuses, tenant, session, worker = ARGV[9], ARGV[10], ARGV[15], ARGV[16]
local AT_A_TIME = 50

local function is_asked_for(value, asked) return asked == '' or value == asked end
local function is_status_asked_for(status)
  return statuses == '' or string.find(' ' .. statuses .. ' ', ' ' .. status .. ' ', 1, true) ~= nil
end

-- Where to look: on the shelves that may hold such jobs, or in a smaller set, of the session for one.
local matching, of_worker, tenants = {}, {}, {}
for _, name in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  local whose, kind, store, status, code, model = string.match(name, '^([^:]*):([^:]*):([^:]*):([^:]*):([^:]*):(.*)$')
  if is_asked_for(whose, tenant) then tenants[whose] = true end
  if is_asked_for(whose, tenant) and is_asked_for(kind, ARGV[11]) and is_asked_for(store, ARGV[12])
     and is_status_asked_for(status) and is_asked_for(code, ARGV[14]) and is_asked_for(model, ARGV[13]) then
    matching[#matching + 1] = shelf_key(name)
    if status == 'running' or status == 'succeeded' then of_worker[#of_worker + 1] = shelf_key(name) end
  end
end

local function size(keys)
  local jobs = 0
  for _, key in ipairs(keys) do jobs = jobs + redis.call('ZCARD', key) end
  return jobs
end

local fewest, jobs_there = matching, size(matching)
local function look_in(keys)
  local jobs = size(keys)
  if jobs < jobs_there then fewest, jobs_there = keys, jobs end
end
if session ~= '' then look_in({session_jobs_key(session)}) end
if worker ~= '' then
  of_worker[#of_worker + 1] = worker_jobs_ended_badly_key(worker)
  look_in(of_worker)
end
for i = 17, #ARGV do
  local keys = {}
  for whose in pairs(tenants) do keys[#keys + 1] = pair_jobs_key(whose .. ':' .. ARGV[i]) end
  look_in(keys)
end

local function precedes(one, other) -- in the order that is asked for
  if one.ms ~= other.ms then return (one.ms < other.ms) == ascending end
  return one.id ~= other.id and (one.id < other.id) == ascending
end

-- How many jobs of a set come before those that are asked for.
local function rank_of_first(key)
  local bound, rank = ascending and since_ms or not ascending and until_ms, 0
  if bound then
    rank = ascending and redis.call('ZCOUNT', key, '-inf', '(' .. int(bound))
      or redis.call('ZCOUNT', key, '(' .. int(bound), '+inf')
  end
  if not after_ms then return rank end
  local at = int(after_ms)
  local before = ascending and redis.call('ZCOUNT', key, '-inf', '(' .. at)
    or redis.call('ZCOUNT', key, '(' .. at, '+inf')
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', key, at, at)) do
    if not precedes({ms = after_ms, id = after_id}, {ms = after_ms, id = id}) then before = before + 1 end
  end
  return math.max(rank, before)
end

-- The next job of a set, or nil.
local function head(source)
  if source.at > #source.jobs and not source.is_done then
    local command = ascending and 'ZRANGE' or 'ZREVRANGE'
    local reply = redis.call(command, source.key, source.rank, source.rank + AT_A_TIME - 1, 'WITHSCORES')
    source.jobs, source.at, source.rank = {}, 1, source.rank + AT_A_TIME
    source.is_done = #reply < 2 * AT_A_TIME
    for i = 1, #reply, 2 do
      local ms = tonumber(reply[i + 1])
      if ascending and until_ms and ms > until_ms or not ascending and since_ms and ms < since_ms then
        source.is_done = true
        break
      end
      source.jobs[#source.jobs + 1] = {id = reply[i], ms = ms}
    end
  end
  return source.jobs[source.at]
end

local function matches(record)
  local status, error, pairs_of_job = record[1], record[2], ' ' .. (record[9] or '') .. ' '
  for i = 17, #ARGV do
    if not string.find(pairs_of_job, ' ' .. ARGV[i] .. ' ', 1, true) then return false end
  end
  return is_status_asked_for(status) and is_asked_for(error_code(error), ARGV[14]) and is_asked_for(record[3], tenant)
    and is_asked_for(record[4], ARGV[11]) and is_asked_for(record[5], ARGV[12]) and is_asked_for(record[6], ARGV[13])
    and is_asked_for(record[7], session) and is_asked_for(record[8], worker)
end

-- Of a record, what a list shows. Not what may be as large as a request: `echo`, `traceback`.
local LISTED = {'status', 'kind', 'tenant', 'session', 'model', 'user', 'store', 'background', 'attempt', 'worker',
                'accepted_ms', 'deadline_ms', 'promoted_ms', 'started_ms', 'first_token_ms', 'last_token_ms', 'tool_ms',
                'finished_ms', 'entries', 'finish_reason', 'usage', 'error', 'metadata', 'lost', 'retry_of'}

local sources, found, stale = {}, {}, {}
for _, key in ipairs(fewest) do
  sources[#sources + 1] = {key = key, rank = rank_of_first(key), jobs = {}, at = 1, is_done = false}
end
local last, may_be_more
for _ = 1, tonumber(ARGV[3]) do
  local next_one, its_source
  for _, source in ipairs(sources) do
    local job = head(source)
    if job and (not next_one or precedes(job, next_one)) then next_one, its_source = job, source end
  end
  may_be_more = next_one ~= nil
  if not next_one or #found == most then break end
  its_source.at, last = its_source.at + 1, next_one
  local record = redis.call('HMGET', job_key(next_one.id), 'status', 'error', 'tenant', 'kind', 'store', 'model',
                            'session', 'worker', 'pairs')
  if not record[1] then
    stale[#stale + 1] = {its_source.key, next_one.id}
  elseif matches(record) then
    local values, listed = redis.call('HMGET', job_key(next_one.id), unpack(LISTED)), {}
    for i, name in ipairs(LISTED) do
      if values[i] then
        listed[#listed + 1] = name
        listed[#listed + 1] = values[i]
      end
    end
    found[#found + 1] = {next_one.id, listed}
  end
end
for _, member in ipairs(stale) do redis.call('ZREM', member[1], member[2]) end
return {may_be_more and '1' or '0', last and int(last.ms) or '', last and last.id or '', found}
