"""A LangGraph graph: one node that asks a chat model.

    make install EXTRA=langgraph
    ENDMARK_AGENT=examples.langgraph_agent:agent make run

The model is a fake of LangChain's that needs no key. Put yours in its place, such as ChatOpenAI of langchain-openai.
"""

from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import AIMessage
from langgraph.graph import START, MessagesState, StateGraph

model = FakeListChatModel(responses=["Hello from a graph."])


async def answer(state: MessagesState) -> dict[str, list[AIMessage]]:
    return {"messages": [await model.ainvoke(state["messages"])]}


def count(state: MessagesState) -> dict[str, list[AIMessage]]:
    questions = sum(message.type == "human" for message in state["messages"])
    return {"messages": [AIMessage(f" You have asked {questions} times.")]}


builder = StateGraph(MessagesState).add_sequence([answer, count]).add_edge(START, "answer")
agent = builder.compile()
